"""An engine that is made of replicas on Ray Serve. Only this folder of the engines imports Ray.

engine         the engine as the scorer sees it: cuts calls into shards, and puts the results together
replica        the code that runs in each replica's process
prompt_router  sends a shard to the replica that has its prompt in its cache
service        starts and ends Ray, Serve and the deployment; says why it does not start
weights        loads weights into all replicas or into none
"""
