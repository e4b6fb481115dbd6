"""deepprob: probabilistic deep models you can trust, on Pyro and PyTorch."""
