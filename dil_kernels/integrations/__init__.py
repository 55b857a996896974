"""The losses and kernels inside trainers that others wrote; each module needs the package it is named after."""
