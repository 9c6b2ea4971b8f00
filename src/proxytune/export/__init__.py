"""Models, adapters and recipes as GGUF files, which llama.cpp runs.

A Llama-shaped model in the Hugging Face layout becomes one file of the architecture `llama`; a LoRA adapter
becomes a file that llama.cpp applies to it; a recipe becomes a directory with both and a recipe that names
them.
"""
