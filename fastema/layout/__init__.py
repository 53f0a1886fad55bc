"""Where the bytes are: dtypes, tensor descriptions, groups and chunk tables."""
