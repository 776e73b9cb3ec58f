# One image, three ways to run it:
#   watcher      (default) as uid 65532
#   enforcer     --user 0 --pid host --privileged ... /opt/power-agent/enforcer/bin/python -I -m enforcer
#   both         --user 0 --pid host --privileged ... supervisord -c supervisord.conf
#
#   docker build -t dynamo/power-agent:v1.0.0 .
#
# The base must have glibc: on musl the kernel's word about a caller can be forged (libzmq cannot
# name the peer there and takes what the peer says of itself). Pin it by its digest:
#   docker build --build-arg BASE=python@sha256:<digest> ...
ARG BASE=python:3.13-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python3 -c 'import platform; assert platform.libc_ver()[0] == "glibc", "the base needs glibc"' \
    && python3 -m venv /tmp/installer
COPY deploy/lock deploy/lock
# One environment for each program, so that a wrong import cannot even resolve: the root side has
# no Kubernetes client, the API side no NVML. None has pip.
RUN for part in enforcer watcher supervised; do \
        python3 -m venv --without-pip /opt/power-agent/$part \
        && /tmp/installer/bin/pip --python /opt/power-agent/$part/bin/python install \
            --quiet --no-compile --require-hashes --only-binary :all: --requirement deploy/lock/$part.txt \
        || exit 1; \
    done
COPY enforcer enforcer
COPY watcher watcher
COPY shared shared
RUN install_code() { \
        site=$(/opt/power-agent/$1/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
        && shift && cp -R "$@" "$site"; \
    } \
    && install_code enforcer enforcer shared \
    && install_code watcher watcher shared \
    && install_code supervised shared \
    && mkdir /opt/power-agent/bin \
    && printf '#!%s -I\n%s\n' /opt/power-agent/enforcer/bin/python \
        'from shared.powerctl.__main__ import main; raise SystemExit(main())' \
        >/opt/power-agent/bin/powerctl \
    && chmod 0755 /opt/power-agent/bin/powerctl \
    && ln -s ../supervised/bin/supervisord /opt/power-agent/bin/supervisord
COPY LICENSE supervisord.conf /opt/power-agent/
COPY deploy/probe /opt/power-agent/bin/probe
COPY deploy/supervised /opt/power-agent/deploy/supervised
# Bytecode that is not tied to times: starts fast on a read-only root, same bytes in every build.
# Not for the client library's generated code, which the watcher never imports: 50 MB less.
RUN for part in enforcer watcher supervised; do \
        /opt/power-agent/$part/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash \
            -x '/kubernetes/(aio|client/(api|models))/' /opt/power-agent/$part/lib || exit 1; \
    done \
    && chmod -R u=rwX,go=rX /opt/power-agent && chmod 0755 /opt/power-agent/bin/probe

FROM ${BASE}
LABEL org.opencontainers.image.title="Power Agent" \
      org.opencontainers.image.description="Keeps GPU power limits at what the pods using them ask for" \
      org.opencontainers.image.version="1.0.0" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN echo 'power-agent:x:65532:65532:Power Agent:/:/usr/sbin/nologin' >>/etc/passwd \
    && echo 'power-agent:x:65532:' >>/etc/group \
    && mkdir -p /run/power-agent /var/lib/power-agent \
    && chmod 0755 /run/power-agent && chmod 0700 /var/lib/power-agent
COPY --from=build /opt/power-agent /opt/power-agent
# supervisord wants a folder for temporary files before it reads its configuration; on a read-only
# root the sockets' folder is the one that root can always write. With another POWER_AGENT_RUN_DIR set
# this to the same.
ENV TMPDIR=/run/power-agent
# No GPU unless asked for: the watcher has no use for one (`--gpus all` and the manifest ask).
ENV PATH=/opt/power-agent/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    NVIDIA_VISIBLE_DEVICES=void \
    NVIDIA_DRIVER_CAPABILITIES=utility
WORKDIR /opt/power-agent
USER 65532:65532
EXPOSE 9100
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=15s --retries=3 CMD ["probe", "2"]
CMD ["/opt/power-agent/watcher/bin/python", "-I", "-m", "watcher"]
