"""Arguments of the Megatron side, and their form as Megatron-LM's own command line."""
