# docker build --build-arg VERSION=v0.1.0 --tag ghcr.io/kaidotio/at-least-semaphore-pod-hook:v0.1.0 .
#
# Needs BuildKit, the default of "docker build" since Docker 23 (DOCKER_BUILDKIT=1
# before).
#
# The same sources and Go release make the same binary, byte by byte: it contains no
# paths, times or commits.
FROM --platform=$BUILDPLATFORM golang:1.26.8@sha256:9d2f36f06329b2a141b9db99ffa32765cf695ee57b813ca29e245e8670bcbfff AS build
WORKDIR /src
# A layer of its own: the build downloads modules only when these two files change.
COPY go.mod go.sum ./
RUN go mod download
COPY *.go ./
COPY lua/ lua/
ARG VERSION=dev
# BuildKit sets these for each platform of "docker buildx build --platform". If they are
# unset, the builder's own platform is used.
ARG TARGETOS TARGETARCH
# Without gRPC's tracing, a fifth of the binary.
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -buildvcs=false -tags grpcnotrace -ldflags "-s -w -X main.version=$VERSION" -o /at-least-semaphore-pod-hook .

# No shell, no package manager. It has the certificates of public authorities, for
# rediss:// and https://.
FROM gcr.io/distroless/static:nonroot@sha256:e2e927ec666bae08560abb3c55d0659eceabb657f56b6782ab500a9fc7f555e3
# By number: the kubelet checks runAsNonRoot by it. Any other user can run the program,
# too.
USER 65532:65532
COPY --from=build /at-least-semaphore-pod-hook /at-least-semaphore-pod-hook
ENTRYPOINT ["/at-least-semaphore-pod-hook"]
