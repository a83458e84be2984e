"""Jobs from Python: asked for and waited for, one or many, in the formats that the server reads."""
