"""Who may take part: keys, certificates, the roster, the fleet's directory, and signed lists of tensors."""
