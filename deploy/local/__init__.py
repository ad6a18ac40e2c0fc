"""Runs every service on one machine: Valkey, vision service, LLM service and gateway as child processes."""

from deploy.local.stack import LocalStack, PartState, StackError, StackOptions

__all__ = ["LocalStack", "PartState", "StackError", "StackOptions"]
