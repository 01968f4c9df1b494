"""The frozen model: how it is loaded, plain, quantised or embedded; where its attention, feed-forward, embeddings and
heads are (`families`, `heads`); and walks over it that pass adapters by (`tree`)."""
