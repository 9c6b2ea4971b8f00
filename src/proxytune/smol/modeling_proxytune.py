"""Leads transformers to the package `proxytune`, which reads this recipe and has to be installed."""

from proxytune.integrations.auto import ProxyTunedConfig
from proxytune.integrations.transformers import ProxyTunedForCausalLM

__all__ = ["ProxyTunedConfig", "ProxyTunedForCausalLM"]
