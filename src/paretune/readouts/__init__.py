"""How an answer is read where that is not a trained head: class vectors, and language models that rank answers."""
