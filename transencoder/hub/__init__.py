"""What leaves the machine: repositories, cards, ONNX files."""
