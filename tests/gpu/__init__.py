"""Tests on a GPU: ``make test-gpu``, which needs one GPU; the others run on the CPU, whatever the machine has."""
