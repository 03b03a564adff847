"""The exported model for Hugging Face: two source files in plain torch that travel in its folder, and what goes along.

``configuration_ecp.py`` and ``modeling_ecp.py`` know nothing of this package, which copies them beside the weights.
"""
