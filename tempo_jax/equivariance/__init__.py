"""Key classes, and the rules by which an operation or an optimizer commutes with a blinding."""
