"""For all tests: offline, one thread, quiet."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
