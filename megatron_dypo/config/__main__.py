"""Print the reference page from the schema: ``python -m megatron_dypo.config > docs/configuration.md``."""

from megatron_dypo.config.render import page

if __name__ == "__main__":
    print(page(), end="")
