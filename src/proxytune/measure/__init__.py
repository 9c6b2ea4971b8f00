"""What models say of given texts: perplexity, likelihoods, strengths, experts."""
