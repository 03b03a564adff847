"""How ranks share a model: groups, tensor-parallel layers, halo, recomputation, random state, devices."""
