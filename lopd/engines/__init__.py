"""What runs a model: `hf`, `vllm`, `server` and `on_ray` sample and score, each with its own dependencies; `student` trains."""
