"""Leads transformers to the package `proxytune`, which reads this recipe: pip install proxytune."""

from proxytune.integrations.auto import ProxyTunedConfig
from proxytune.integrations.transformers import ProxyTunedForCausalLM

__all__ = ["ProxyTunedConfig", "ProxyTunedForCausalLM"]
