"""Image models: the device's blocks of a UNet, and what takes the body's place among them."""
