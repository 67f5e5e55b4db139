"""The processes of a run: who they are, how they meet without a process group, and which parts each one trains."""
