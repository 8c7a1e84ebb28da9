"""Draft heads that others publish: EAGLE-3 and DFlash, in the layouts of speculators and of SGLang and z-lab."""
