"""Taking elsewhere what was trained: GGUF files for llama.cpp and Ollama, and a Modelfile."""
