"""The seven parts, in their order: what the device is, what is right, what is fast, what that promises."""
