"""ms-swift: `swift rlhf --external_plugins $(python -m dil_kernels.integrations.swift) --loss_type lsif`."""
