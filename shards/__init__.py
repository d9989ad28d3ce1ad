"""One preparer per dataset: each turns a published source into WebDataset tar shards."""
