"""In and out of ``nn.Module``: models are loaded here, and exported."""
