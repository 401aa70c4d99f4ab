"""Files: weights, codes and images, with atomic writes and safe reads."""
