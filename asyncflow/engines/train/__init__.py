"""The training engine on torch and transformers: any causal language model, one device, no padding."""
