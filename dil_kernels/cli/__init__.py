"""`dil-train` and `dil-env`: options, recipes, and what each prints."""
