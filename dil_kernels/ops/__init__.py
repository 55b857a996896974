"""torch.library ops, their fake implementations and the autograd Functions around them."""
