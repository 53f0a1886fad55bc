"""Memory layout: dtypes, tensor descriptions, checked pairs and chunk tables."""
