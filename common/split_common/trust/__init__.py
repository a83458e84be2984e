"""Who may take part: keys, certificates, the roster, a fleet's directory, signed lists of tensors."""
