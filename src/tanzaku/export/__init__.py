"""Taking elsewhere what was trained: GGUF files for llama.cpp and Ollama (`gguf`), and the model card (`card`)."""
