// A device plugin as small as it can be: it offers the simulated GPUs of this node to the kubelet.
//
//	device-plugin RESOURCE REPLICAS
//
// With 0 replicas the ids are the GPUs' UUIDs, else UUID::0, UUID::1 ..., as NVIDIA's plugin names
// them for time-slicing. It ends where it has no more to do, and whoever started it starts it again.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const state = "/var/lib/simulated-gpus/state"

type plugin struct {
	api.UnimplementedDevicePluginServer
	indices map[string]string // of the GPU that a device's id names
}

func (p plugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

func (p plugin) ListAndWatch(_ *api.Empty, stream grpc.ServerStreamingServer[api.ListAndWatchResponse]) error {
	var devices []*api.Device
	for id := range p.indices {
		devices = append(devices, &api.Device{ID: id, Health: api.Healthy})
	}
	if err := stream.Send(&api.ListAndWatchResponse{Devices: devices}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// Allocate gives the container what the simulated driver knows its processes by, and the hardware to read.
func (p plugin) Allocate(_ context.Context, asked *api.AllocateRequest) (*api.AllocateResponse, error) {
	answer := &api.AllocateResponse{}
	for _, container := range asked.ContainerRequests {
		var indices []string
		for _, id := range container.DevicesIds {
			indices = append(indices, p.indices[id])
		}
		answer.ContainerResponses = append(answer.ContainerResponses, &api.ContainerAllocateResponse{
			Envs:   map[string]string{"SIM_GPUS": strings.Join(indices, ",")},
			Mounts: []*api.Mount{{ContainerPath: "/gpus", HostPath: state, ReadOnly: true}},
		})
	}
	return answer, nil
}

func devices(replicas int) map[string]string {
	order, err := os.ReadFile(state + "/order")
	must(err)
	indices := map[string]string{}
	for index, folder := range strings.Fields(string(order)) {
		uuid, err := os.ReadFile(state + "/" + folder + "/uuid")
		must(err)
		id := strings.TrimSpace(string(uuid))
		if replicas == 0 {
			indices[id] = strconv.Itoa(index)
		}
		for replica := range replicas {
			indices[fmt.Sprintf("%s::%d", id, replica)] = strconv.Itoa(index)
		}
	}
	return indices
}

func register(resource, endpoint string) {
	connection, err := grpc.NewClient("unix://"+api.KubeletSocket,
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(err)
	defer connection.Close()
	request := &api.RegisterRequest{Version: api.Version, Endpoint: endpoint, ResourceName: resource}
	_, err = api.NewRegistrationClient(connection).Register(context.Background(), request)
	must(err)
}

func main() {
	resource := os.Args[1]
	replicas, err := strconv.Atoi(os.Args[2])
	must(err)
	endpoint := strings.ReplaceAll(resource, "/", "-") + ".sock"
	socket := api.DevicePluginPath + endpoint
	os.Remove(socket)
	served := plugin{indices: devices(replicas)}
	listener, err := net.Listen("unix", socket)
	must(err)
	server := grpc.NewServer()
	api.RegisterDevicePluginServer(server, served)
	go server.Serve(listener)
	register(resource, endpoint)
	// A kubelet that starts anew removes all sockets: whoever wants to be known registers again.
	for err == nil {
		time.Sleep(50 * time.Millisecond)
		_, err = os.Stat(socket)
	}
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
