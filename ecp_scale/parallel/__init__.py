"""The only room that touches Megatron's global state, DeepSpeed's mpu, CPU/GPU differences and messages."""
