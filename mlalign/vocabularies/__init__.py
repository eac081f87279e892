"""Object vocabularies: one YAML each, read by ``mlalign.objects.vocabulary``."""
