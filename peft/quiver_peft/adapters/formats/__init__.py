"""Adapters on disk: Hugging Face PEFT, AdapterHub and Quiver's own folders; import and export."""
