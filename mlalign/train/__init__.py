"""Training stages. The only room that imports trl, accelerate and deepspeed."""
