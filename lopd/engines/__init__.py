"""What runs a model: `hf`, `vllm`, `server`, `local` and `on_ray` sample and score, each with its own dependencies; `student` trains."""
