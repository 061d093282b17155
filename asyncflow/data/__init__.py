"""The transfer queue: the ledger, its ordering and packing, the store, and where prompts come from."""
