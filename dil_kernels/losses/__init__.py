"""What a loss is: its divergence, its options, its scalar math in torch, and the tabular optimum."""
