"""Federated learning: `engine` runs rounds over stacked clients, `baselines` holds the classics,
and every other module is one paper."""
