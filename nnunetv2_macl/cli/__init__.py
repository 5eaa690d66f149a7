"""Command lines: arguments in, messages out; what is done lies elsewhere."""
