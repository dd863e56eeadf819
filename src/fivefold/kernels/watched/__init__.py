"""What a decoding step does besides attending: what tokens received, what is picked, which token goes."""
