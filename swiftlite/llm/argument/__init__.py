"""Arguments of the commands, and the parts that the Hugging Face and Megatron sides share."""
