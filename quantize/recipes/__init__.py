"""How variants are made: calibration, fp16, int8 as Q/DQ, nvidia-modelopt, and the cost of each layer."""
