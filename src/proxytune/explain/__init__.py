"""What steering did to each token: computed, drawn and shown."""
