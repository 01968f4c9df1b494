"""Speed, memory and quality beside HF PEFT. `python -m bench` prints the tables of docs/benchmarks.md."""
