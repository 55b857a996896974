"""`python -m dil_kernels.quickstart`, the model it trains and the pairs it trains on."""
